"""What the model reads: how raw inputs become arrays, and canary inputs.

One module for each modality.
"""
