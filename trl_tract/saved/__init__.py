"""What stands beside trained weights, and what goes to the hub: the judge's configuration and the cards."""
