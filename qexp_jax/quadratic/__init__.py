"""The public quadratic model: made of public records and of earlier releases only, never of private records."""
