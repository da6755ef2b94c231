"""Settings: frozen dataclasses, read from YAML and `a.b=c` overrides and validated in full.

Read `settings` first; `fields` describes fields in words, `yaml12` reads and writes YAML 1.2, and
`errors` has the base of every error that a user has to fix.
"""
