"""A trained network and a person's recordings: `dls embed`, `dls search`, `dls predict`, `dls label`."""
