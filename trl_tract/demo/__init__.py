"""`trl-tract demo`: both stages on a real small model, with rows that the project makes."""
