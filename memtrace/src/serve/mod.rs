//! HTTP: metrics, health, incidents.
