"""beartype for the shapes in annotations; whole numbers pass for floats, as PEP 484 says."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
