"""Parts for other libraries, one module each; nothing here is imported unless you import it."""
