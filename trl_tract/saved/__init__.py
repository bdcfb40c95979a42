"""Files beside trained weights and on the hub: the judge's configuration and the cards."""
