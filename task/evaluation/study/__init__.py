"""The augmentation study: whether generated images make a classifier better.

`arms` says which images each classifier is trained on, `classifiers` which network it is, `fitting`
trains one, `study` all of them, with what is kept on disk. `figures` measures their answers,
`gains` compares them over resampled patients, `summary` says what was found.
"""
