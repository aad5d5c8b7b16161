"""`python -m dspark_server`, also for `torchrun -m dspark_server`."""

from dspark_server.cli import main

if __name__ == "__main__":
    main()
