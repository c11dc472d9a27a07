"""What a model is trained for, one objective a file; each keeps the contract of core/objective.py."""
