"""From a loss to the gradients of single records, in a subspace of the parameters; which losses keep records apart."""
