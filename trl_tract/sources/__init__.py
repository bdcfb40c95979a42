"""Files, hub ids, schemas and rubrics -> judge items: the door through which rows come in."""
