"""What `estimators.py` is made of: the model and its data, the methods, the peers, the tables."""
