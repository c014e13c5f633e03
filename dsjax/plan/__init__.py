"""Plans a job for chips that are not there: compiles the real step and reads what the compiler says."""
