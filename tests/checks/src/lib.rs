//! Checks of the sources, before anything is run: format, lints, house rules, licences, docs.

pub mod ci;
pub mod tidy;
