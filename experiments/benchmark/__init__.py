"""This library against existing private fine-tuning, setting by setting."""
