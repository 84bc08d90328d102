//! Checks of the source tree that run no test: format, lints, house rules, licences, docs.

pub mod ci;
pub mod tidy;
