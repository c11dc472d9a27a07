"""What becomes batches: text now; every kind of data keeps the contract of core/dataset.py."""
