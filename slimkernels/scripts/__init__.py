"""What `slimkernels <command>` runs: one module a command, with `main(argv)`."""
