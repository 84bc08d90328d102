//! Who may ask: a page that a browser has open must not read this machine through a name of its own
//! that it lets point here (DNS rebinding), so a request must name the server by address, as
//! `localhost`, by this machine's name or by one that the operator allows. What comes in by the
//! unix socket comes from no browser and may name any host.
//!
//! Then `access` decides who may see what.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderName, HeaderValue, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::access::{Access, Door, Token, WrongTokenLog, decide};
use super::server::{ServerCounts, count};

/// What every answer says to a browser: nothing loads, nothing runs, nothing is kept, nobody frames it.
const HEADERS: [(HeaderName, &str); 4] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
];

/// The names a request may use for this server, besides addresses and `localhost`.
#[derive(Clone, Debug, Default)]
pub struct HostNames(Arc<[String]>);

impl HostNames {
    /// These and the name of this machine.
    pub fn with_own(names: &[String]) -> Self {
        let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self(names.iter().cloned().chain([own]).filter(|name| !name.is_empty()).collect())
    }

    /// Whether a request for this host and port is for us.
    fn allow(&self, authority: &str) -> bool {
        // No browser sends a user's name along.
        let parsed = authority.parse::<Authority>().ok().filter(|_| !authority.contains('@'));
        let Some(authority) = parsed else { return false };
        let host = authority.host();
        let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let named = |name: &str| host.eq_ignore_ascii_case(name);
        address.parse::<IpAddr>().is_ok() || named("localhost") || self.0.iter().any(|name| named(name))
    }
}

/// What requests that came in by one door are held against.
#[derive(Clone)]
pub(super) struct Guard {
    pub(super) door: Door,
    pub(super) names: HostNames,
    /// `None` when none is configured.
    pub(super) token: Option<Arc<Token>>,
    pub(super) counts: Arc<ServerCounts>,
    pub(super) wrong_tokens: Arc<WrongTokenLog>,
}

/// The address a request came from; `None` for one that came in by the unix socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) Option<IpAddr>);

/// Refuses a request for another host or without the right to what it asks for, and puts
/// [`HEADERS`] on every answer.
pub(super) async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let mut answer = match guard.foreign(&request).or_else(|| guard.denied(&request)) {
        Some(refusal) => refusal,
        None => next.run(request).await,
    };
    for (name, value) in HEADERS {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}

impl Guard {
    /// The refusal of a request for another host.
    fn foreign(&self, request: &Request) -> Option<Response> {
        if self.door == Door::Socket {
            return None;
        }
        let refusal = refusal(&self.names, request)?;
        count(&self.counts.foreign_host);
        Some(refusal)
    }

    /// The refusal of a request that may not see what it asks for.
    fn denied(&self, request: &Request) -> Option<Response> {
        let access = decide(self.door, request.uri().path(), self.token.as_deref(), request.headers());
        match access {
            Access::Granted => return None,
            Access::NoToken => count(&self.counts.no_token),
            Access::NotHere => count(&self.counts.not_here),
            Access::WrongToken => {
                count(&self.counts.wrong_token);
                self.wrong_tokens.note(request.extensions().get::<Peer>().and_then(|peer| peer.0));
            }
        }
        access.refusal()
    }
}

fn refusal(names: &HostNames, request: &Request) -> Option<Response> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    // HTTP/1.0 has no such header, and no browser speaks it.
    let missing = host.is_none() && request.version() > Version::HTTP_10;
    if missing || second.is_some() {
        return Some((StatusCode::BAD_REQUEST, "a request needs one Host\n").into_response());
    }
    let of_header = host.map(|host| host.to_str().unwrap_or_default());
    let of_target = request.uri().authority().map(Authority::as_str);
    let foreign = of_header.into_iter().chain(of_target).any(|authority| !names.allow(authority));
    let why = "this Host is not served; use an address or localhost, or start the agent with --allow-host NAME\n";
    foreign.then(|| (StatusCode::MISDIRECTED_REQUEST, why).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_an_address_or_a_name_that_is_allowed() {
        let names = HostNames(["metrics.example".to_owned(), "node1".to_owned()].into());
        for good in ["127.0.0.1", "10.1.2.3:9469", "[::1]:9469", "[::1]", "localhost", "LOCALHOST:1", "node1:9469"] {
            assert!(names.allow(good), "{good}");
        }
        assert!(names.allow("Metrics.Example:9469"));
        for bad in [
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil",
            "evil@",
            "evil@127.0.0.1",
            "",
            "::1",
            "a b",
            "node1.x",
            "[::1",
        ] {
            assert!(!names.allow(bad), "{bad}");
        }
        assert!(HostNames::default().allow("localhost") && !HostNames::default().allow("node1"));
        let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
        assert!(HostNames::with_own(&[]).allow(&own), "{own}");
    }
}
