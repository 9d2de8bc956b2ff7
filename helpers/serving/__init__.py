"""State dict to answers: fetched, mapped, loaded, asked in batches, as Beam transforms."""
