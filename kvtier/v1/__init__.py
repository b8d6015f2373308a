"""Generated from proto/kvtier/v1 by proto/generate.sh; never edited."""
