//! Incident to text and JSON; pure.
