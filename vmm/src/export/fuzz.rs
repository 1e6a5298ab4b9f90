//! The exporter for fuzzers: a guest's memory, an importer that sends any bytes, and no socket in between.
