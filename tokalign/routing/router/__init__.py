"""The router: its features, its model, how it is trained, measured and calibrated to a budget."""
