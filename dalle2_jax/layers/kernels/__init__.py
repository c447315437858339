"""Operations that have a faster form on some platform, one a file; the plain form is what they are tested against."""
