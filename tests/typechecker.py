"""beartype for the shapes in annotations; a whole number passes for a float, as type checkers say."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
