"""Run ``csg-seg`` by ``python -m csg_seg``."""

from .cli.main import main

if __name__ == '__main__':
    main()
