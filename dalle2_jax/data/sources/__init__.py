"""The kinds of data, one a file: what each gives is a `Source` of images and captions."""
