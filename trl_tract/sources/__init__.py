"""Reading rows: files, hub ids, column layouts and rubrics become items to train on or to judge."""
