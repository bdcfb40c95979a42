"""`trl-tract demo`: both stages on a real small model, on rows that the project makes itself."""
