"""`python -m vfu_dev` is the same as `vfu-dev`."""

from vfu_dev.cli import main

if __name__ == "__main__":
    main()
