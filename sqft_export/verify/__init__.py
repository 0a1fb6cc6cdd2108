"""The certificate: what was trained is what was merged, what is stored, and what runs."""
