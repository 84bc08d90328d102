//! Who may see what: by where a connection came in, what it asks for, and the token it brings.
//!
//! The unix socket's mode is its authentication. On loopback everybody on this machine may ask,
//! unless a token is configured. From elsewhere only health and metrics are answered without one.

use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use tracing::warn;

/// What is answered to everybody who can connect.
const OPEN_PATHS: [&str; 3] = ["/healthz", "/readyz", "/metrics"];
/// Fewest characters of a token. 16 hexadecimal digits, the weakest that it may consist of, are 64
/// bits.
const TOKEN_MIN: usize = 16;
/// Most characters of a token; a head has 16 KiB in all.
const TOKEN_MAX: usize = 1024;
/// How often wrong tokens are logged at most.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Where a connection came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Door {
    /// The unix socket.
    Socket,
    /// TCP, with a loopback address at both ends.
    Loopback,
    /// TCP from or to any other address, also one of this machine.
    Network,
}

impl Door {
    /// By the addresses of the two ends. Both count: a rewritten destination (DNAT with
    /// `route_localnet`) is a loopback address here, and the sender's is not.
    pub(super) fn of(local: Option<SocketAddr>, peer: SocketAddr) -> Self {
        let loopback = |address: SocketAddr| address.ip().to_canonical().is_loopback();
        if local.is_some_and(loopback) && loopback(peer) { Self::Loopback } else { Self::Network }
    }
}

/// What a client has to know to see more than health and metrics over TCP.
pub struct Token(Box<[u8]>);

impl std::fmt::Debug for Token {
    /// Does not show it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// Takes the text of a token. Fails, with what would be right, when it is too short or long or
    /// cannot be sent in a header.
    pub fn new(text: &str) -> Result<Self, String> {
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("a token is one line of ASCII without blanks".to_owned());
        }
        match text.len() {
            TOKEN_MIN..=TOKEN_MAX => Ok(Self(text.as_bytes().into())),
            _ => Err(format!("a token has {TOKEN_MIN} to {TOKEN_MAX} characters")),
        }
    }

    /// Compares in a time that does not depend on where the two differ.
    fn is(&self, given: &[u8]) -> bool {
        let difference = self.0.iter().zip(given).fold(0, |found, (a, b)| std::hint::black_box(found | (a ^ b)));
        self.0.len() == given.len() && difference == 0
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// It is answered.
    Granted,
    /// It needs a token and has none.
    NoToken,
    /// It has another token than the one that is configured.
    WrongToken,
    /// It needs a token, and none is configured.
    NotHere,
}

/// Decides by the door, the path, the configured token, and what the request has in its headers.
pub(super) fn decide(door: Door, path: &str, token: Option<&Token>, headers: &HeaderMap) -> Access {
    match (door, token) {
        (Door::Socket, _) | (Door::Loopback, None) => Access::Granted,
        _ if OPEN_PATHS.contains(&path) => Access::Granted,
        (Door::Network, None) => Access::NotHere,
        (Door::Loopback | Door::Network, Some(token)) => match given(headers) {
            None => Access::NoToken,
            Some(given) if token.is(&given) => Access::Granted,
            Some(_) => Access::WrongToken,
        },
    }
}

/// The token that a request has: `Bearer TOKEN`, or `Basic` with any name and the token as
/// password, which is what a browser asks its user for. Empty when it cannot be read.
fn given(headers: &HeaderMap) -> Option<Vec<u8>> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (value, second) = (values.next()?, values.next());
    let text = value.to_str().ok().filter(|_| second.is_none()).unwrap_or_default();
    let (scheme, credentials) = text.split_once(' ').unwrap_or_default();
    let credentials = credentials.trim();
    let token = if scheme.eq_ignore_ascii_case("bearer") {
        Some(credentials.as_bytes().to_vec())
    } else if scheme.eq_ignore_ascii_case("basic") {
        let pair = BASE64_STANDARD.decode(credentials).unwrap_or_default();
        let colon = pair.iter().position(|byte| *byte == b':');
        colon.and_then(|at| pair.get(at + 1..)).map(<[u8]>::to_vec)
    } else {
        None
    };
    Some(token.unwrap_or_default())
}

impl Access {
    /// The answer to a request that is not granted.
    pub(super) fn refusal(self) -> Option<Response> {
        const SCHEMES: [(HeaderName, &str); 1] =
            [(header::WWW_AUTHENTICATE, "Basic realm=\"memtrace\", charset=\"UTF-8\", Bearer realm=\"memtrace\"")];
        let asked = |why: &'static str| (StatusCode::UNAUTHORIZED, SCHEMES, why).into_response();
        match self {
            Self::Granted => None,
            Self::NoToken => Some(asked(
                "this needs the token of --token-file, as `Authorization: Bearer TOKEN` or as the password\n",
            )),
            Self::WrongToken => Some(asked("this is not the token of --token-file\n")),
            Self::NotHere => Some(
                (
                    StatusCode::FORBIDDEN,
                    "from here only /healthz, /readyz and /metrics are answered; start the agent with --token-file \
                     FILE, or ask its socket or loopback address on its own machine\n",
                )
                    .into_response(),
            ),
        }
    }
}

/// Logs wrong tokens, once in [`LOG_EVERY`].
#[derive(Debug, Default)]
pub(super) struct WrongTokenLog(Mutex<(Option<Instant>, u64)>);

impl WrongTokenLog {
    /// Notes one from this address.
    pub(super) fn note(&self, from: Option<IpAddr>) {
        if let Some(requests) = self.due(Instant::now()) {
            let from = from.map_or_else(|| "unknown".to_owned(), |from| from.to_string());
            warn!(requests, %from, "HTTP requests with a wrong token; counted in memtrace_http_refused_total");
        }
    }

    /// How many are to be logged now, the one at hand included; `None` while the last line is too
    /// young.
    fn due(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().ok()?;
        let (logged, requests) = &mut *state;
        *requests = requests.saturating_add(1);
        if logged.is_some_and(|logged| now.saturating_duration_since(logged) < LOG_EVERY) {
            return None;
        }
        *logged = Some(now);
        Some(std::mem::take(requests))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (header::AUTHORIZATION, value.parse().unwrap())).collect()
    }

    #[test]
    fn a_door_is_loopback_only_if_both_ends_are() {
        for (local, peer, door) in [
            ("127.0.0.1:1", "127.0.0.1:2", Door::Loopback),
            ("127.9.9.9:1", "127.0.0.1:2", Door::Loopback),
            ("[::1]:1", "[::1]:2", Door::Loopback),
            ("[::ffff:127.0.0.1]:1", "[::ffff:127.0.0.1]:2", Door::Loopback),
            ("[::ffff:10.0.0.1]:1", "[::ffff:10.0.0.1]:2", Door::Network),
            ("10.0.0.1:1", "10.0.0.1:2", Door::Network),
            ("127.0.0.1:1", "10.0.0.1:2", Door::Network),
            ("10.0.0.1:1", "127.0.0.1:2", Door::Network),
            ("[fe80::1]:1", "[fe80::2]:2", Door::Network),
            ("0.0.0.0:1", "127.0.0.1:2", Door::Network),
        ] {
            assert_eq!(Door::of(Some(local.parse().unwrap()), peer.parse().unwrap()), door, "{local} {peer}");
        }
        assert_eq!(Door::of(None, "127.0.0.1:2".parse().unwrap()), Door::Network);
    }

    #[test]
    fn the_table_of_doors_paths_and_tokens() {
        let token = Token::new(TOKEN).unwrap();
        let right = headers(&[&format!("Bearer {TOKEN}")]);
        let wrong = headers(&["Bearer 0123456789abcdeX"]);
        let none = headers(&[]);
        use Access::{Granted, NoToken, NotHere, WrongToken};
        for path in ["/", "/api/incidents", "/api/incidents/latest", "/none", "/metrics/", "//healthz", "/Metrics", ""]
        {
            for (door, token, request, access) in [
                (Door::Socket, None, &none, Granted),
                (Door::Socket, Some(&token), &none, Granted),
                (Door::Socket, Some(&token), &wrong, Granted),
                (Door::Loopback, None, &none, Granted),
                (Door::Loopback, None, &wrong, Granted),
                (Door::Loopback, Some(&token), &none, NoToken),
                (Door::Loopback, Some(&token), &wrong, WrongToken),
                (Door::Loopback, Some(&token), &right, Granted),
                (Door::Network, None, &none, NotHere),
                (Door::Network, None, &right, NotHere),
                (Door::Network, Some(&token), &none, NoToken),
                (Door::Network, Some(&token), &wrong, WrongToken),
                (Door::Network, Some(&token), &right, Granted),
            ] {
                assert_eq!(decide(door, path, token, request), access, "{door:?} {path} {token:?} {request:?}");
            }
        }
        for (path, door) in
            OPEN_PATHS.into_iter().flat_map(|path| [Door::Loopback, Door::Network].map(|door| (path, door)))
        {
            for (token, request) in [(None, &none), (Some(&token), &none), (Some(&token), &wrong)] {
                assert_eq!(decide(door, path, token, request), Granted, "{path}");
            }
        }
    }

    #[test]
    fn a_token_comes_as_bearer_or_as_a_password() {
        let token = Token::new(TOKEN).unwrap();
        let access = |values: &[&str]| decide(Door::Network, "/", Some(&token), &headers(values));
        let basic = |pair: &str| format!("Basic {}", BASE64_STANDARD.encode(pair));
        for good in [
            format!("Bearer {TOKEN}"),
            format!("bearer  {TOKEN}"),
            basic(&format!(":{TOKEN}")),
            basic(&format!("me:{TOKEN}")),
        ] {
            assert_eq!(access(&[&good]), Access::Granted, "{good}");
        }
        for bad in [
            TOKEN.to_owned(),
            "Bearer".to_owned(),
            "Bearer ".to_owned(),
            format!("Bearer {TOKEN}0"),
            format!("Bearer {}", &TOKEN[..15]),
            format!("Token {TOKEN}"),
            basic(TOKEN),
            basic(&format!("{TOKEN}:")),
            "Basic !!!".to_owned(),
            "Basic ".to_owned(),
        ] {
            assert_eq!(access(&[&bad]), Access::WrongToken, "{bad}");
        }
        let right = format!("Bearer {TOKEN}");
        assert_eq!(access(&[&right, &right]), Access::WrongToken, "two of them");
    }

    #[test]
    fn a_token_is_long_enough_and_fits_a_header() {
        assert!(Token::new(&"x".repeat(TOKEN_MAX)).is_ok());
        for bad in ["", "short", "0123456789abcde", "0123456789 abcdef", "0123456789\nabcdef", "0123456789abcdeé"] {
            assert!(Token::new(bad).is_err(), "{bad:?}");
        }
        assert!(Token::new(&"x".repeat(TOKEN_MAX + 1)).is_err());
        assert_eq!(format!("{:?}", Token::new(TOKEN).unwrap()), "Token");
    }

    #[test]
    fn wrong_tokens_are_logged_once_a_minute_with_their_number() {
        let log = WrongTokenLog::default();
        let begun = Instant::now();
        assert_eq!(log.due(begun), Some(1));
        for _ in 0..1000 {
            assert_eq!(log.due(begun), None);
        }
        assert_eq!(log.due(begun + LOG_EVERY), Some(1001));
    }
}
