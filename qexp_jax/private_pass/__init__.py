"""The only computing on private values: clipped sums of known sensitivity, in whole steps of a grid."""
