//! An incident as one HTML page that loads nothing: data, scripts and styles are inside the file.
//!
//! Names in an incident come from processes that may be hostile. So Rust puts only JSON and
//! constants into the page, and `html/*.js` reads that JSON and sets text, never markup. As a
//! second line, the page's content security policy (CSP) names the hashes of its scripts and
//! styles; a browser runs no others and sends no request.

use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use memtrace_incident::Incident;
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;
use sha2::{Digest, Sha256};

use super::json;

const STYLES: [&str; 2] = [include_str!("html/uplot/uPlot.min.css"), include_str!("html/page.css")];

/// Scripts in the order they run; each uses those before it.
const SCRIPTS: [&str; 7] = [
    include_str!("html/uplot/uPlot.iife.min.js"),
    include_str!("html/dom.js"),
    include_str!("html/data.js"),
    include_str!("html/flame.js"),
    include_str!("html/curve.js"),
    include_str!("html/tables.js"),
    include_str!("html/page.js"),
];

const BODY: &str = include_str!("html/page.html");

/// The page of an incident, a whole document.
pub fn page(incident: &Incident) -> String {
    let mut page = String::with_capacity(256 * 1024);
    page.push_str("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    page.push_str("<meta http-equiv=\"Content-Security-Policy\" content=\"");
    page.push_str(&policy());
    page.push_str("\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    page.push_str("<meta name=\"referrer\" content=\"no-referrer\">\n<title>memtrace</title>\n");
    for style in STYLES {
        element(&mut page, "style", style);
    }
    page.push_str("</head>\n<body>\n");
    page.push_str(BODY);
    page.push_str("<script type=\"application/json\" id=\"incident\">");
    page = add_data(page, incident);
    page.push_str("</script>\n");
    for script in SCRIPTS {
        element(&mut page, "script", script);
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn element(page: &mut String, name: &str, content: &str) {
    page.push_str(&format!("<{name}>{content}</{name}>\n"));
}

/// The content security policy: the page's own scripts and styles by their hashes, nothing else.
fn policy() -> String {
    let hashes = |contents: &[&str]| {
        let named = contents.iter().map(|content| format!(" 'sha256-{}'", STANDARD.encode(Sha256::digest(content))));
        named.collect::<String>()
    };
    format!(
        "default-src 'none'; script-src{}; style-src{}; base-uri 'none'; form-action 'none'",
        hashes(&SCRIPTS),
        hashes(&STYLES)
    )
}

/// Adds the incident as JSON that cannot end the script element it is in, nor start another.
fn add_data(page: String, incident: &Incident) -> String {
    let begin = page.len();
    let mut page = page.into_bytes();
    let written = incident.serialize(&mut Serializer::with_formatter(&mut page, ScriptFormatter));
    // Every incident can be written as JSON. If that changes, the page says that it has no data.
    if written.is_err() {
        page.truncate(begin);
        page.extend_from_slice(b"null");
    }
    // A serializer of JSON writes UTF-8.
    String::from_utf8(page).unwrap_or_default()
}

/// Writes compact JSON without what HTML or a terminal would obey. JSON has such characters only
/// inside strings, where an escape means the same.
struct ScriptFormatter;

impl Formatter for ScriptFormatter {
    fn write_string_fragment<W: io::Write + ?Sized>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        json::write_escaped(out, text, |character| {
            // The page may be printed in a terminal: control characters and marks of direction.
            matches!(character, '<' | '>' | '&'
                | '\u{7f}'..='\u{9f}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2066}'..='\u{2069}'
                | '\u{feff}')
        })
    }
}

#[cfg(test)]
mod tests {
    use memtrace_incident::fixtures;

    use super::*;

    fn embedded(page: &str) -> &str {
        let (_, rest) = page.split_once("<script type=\"application/json\" id=\"incident\">").unwrap();
        rest.split_once("</script>").unwrap().0
    }

    #[test]
    fn the_data_is_the_incident() {
        for incident in [fixtures::burst(), fixtures::near_miss(), fixtures::hostile()] {
            let page = page(&incident);
            assert_eq!(serde_json::from_str::<Incident>(embedded(&page)).unwrap(), incident);
        }
    }

    #[test]
    fn names_full_of_markup_add_no_element() {
        let mut hostile = fixtures::hostile();
        let (plain, name) = (page(&fixtures::burst()), "</script><script>alert(1)</script><!--&\u{2028}\u{2029}");
        hostile.cgroup.path = Some(name.to_owned());
        hostile.verdict.summary = name.to_owned();
        let page = page(&hostile);
        assert!(!embedded(&page).contains(['<', '>', '&', '\u{2028}', '\u{2029}']));
        for tag in ["<script", "</script", "<style", "<img", "<!--"] {
            assert_eq!(page.matches(tag).count(), plain.matches(tag).count(), "{tag}");
        }
        assert_eq!(serde_json::from_str::<Incident>(embedded(&page)).unwrap(), hostile);
    }

    #[test]
    fn the_policy_names_what_is_in_the_page_and_forbids_the_rest() {
        let page = page(&fixtures::burst());
        let (_, rest) = page.split_once("Content-Security-Policy\" content=\"").unwrap();
        let policy = rest.split_once('"').unwrap().0;
        assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(policy.matches("'sha256-").count(), SCRIPTS.len() + STYLES.len());
        // the hash of `alert('Hello, world.');`, as the specification of CSP has it
        let hello = STANDARD.encode(Sha256::digest("alert('Hello, world.');"));
        assert_eq!(hello, "qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng=");
    }

    #[test]
    fn no_part_of_the_page_ends_itself_or_makes_markup_of_text() {
        for script in SCRIPTS {
            assert!(!script.contains("</script") && !script.contains("<!--"));
            for word in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"] {
                assert!(!script.contains(word), "{word}");
            }
        }
        for style in STYLES {
            assert!(!style.contains("</style") && !style.contains("url(") && !style.contains("@import"));
        }
        assert!(!BODY.contains("src=") && !BODY.contains("href="));
    }

    #[test]
    fn the_page_and_the_text_report_explain_a_cut_alike() {
        use memtrace_incident::Cut;
        let data = include_str!("html/data.js");
        for cut in [Cut::Slice, Cut::Module, Cut::Unwind, Cut::Frames, Cut::Registers, Cut::Gone] {
            let line = format!("{}: \"{}\",", cut.name(), crate::allocations::why_cut(cut));
            assert!(data.contains(&line), "{line}");
        }
    }

    #[test]
    fn the_scripts_are_short() {
        for script in SCRIPTS.iter().skip(1) {
            assert!(script.lines().count() < 500);
        }
    }

    #[test]
    fn a_page_without_data_is_small() {
        let mut bare = fixtures::burst();
        bare.timeline = memtrace_incident::Timeline::default();
        bare.allocation_paths.clear();
        bare.allocations = None;
        assert!(page(&bare).len() < 160 * 1024);
    }
}
