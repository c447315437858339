"""One stage a file: how it is trained (`Recipe`), and what the loop does for it (`Task`)."""
