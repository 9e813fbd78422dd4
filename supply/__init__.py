"""What this project ships and depends on: audit, bill of materials, licences. Run by make."""
