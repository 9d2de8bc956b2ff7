"""Files by their path, on this machine or in Cloud Storage, whole and checked."""
