"""How an update is computed: processes, precision, working copies, gradients and their room."""
