"""`python -m stepwell` is `stepwell`: what `torchrun -m stepwell train ..` starts."""

from stepwell.cli import main

if __name__ == "__main__":
    main()
