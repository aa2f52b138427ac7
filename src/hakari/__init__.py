"""hakari (秤): weigh evidence with `hakari.inference`, carry weight with `hakari.training`."""

__version__ = "0.1.0"
