"""Student selection: candidates cut from the teacher, scored, distilled."""
