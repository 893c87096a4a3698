"""`feddm bench`: how fast the project is, beside what its users would otherwise have.

Every module that `report.SECTIONS` names has `measure(*, full, device)`, which returns figures by
flat names. A name says its unit (`..._mib`, `...images_per_second`); one of more than two parts
is a cell of a table: `peers.diffusers.own.images_per_second`.
"""
