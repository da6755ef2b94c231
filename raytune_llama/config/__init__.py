"""Settings: frozen dataclasses that are read from YAML and `a.b=c` overrides, and checked as a
whole.

Read `settings` first; `fields` describes fields in words, and `yaml12` reads and writes YAML 1.2.
"""
