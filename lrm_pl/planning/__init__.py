"""What training costs, before anything is run: a step on fake tensors, divided over machines."""
