"""The frozen vision encoder: which one it is, what is read out of it, the images of a data set, and the cached column
of teacher vectors. Uses `common`."""
