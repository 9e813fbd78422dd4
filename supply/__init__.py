"""Dependencies of this project: audit, bill of materials, licences. Run by make."""
