"""Training methods whose step differs: TRA, ADARNN, ADD, IGMTF, TCTS, TabNet."""
