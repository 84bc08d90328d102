//! The server as its clients see it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::*;
use memtrace_engine::snapshot::ProcessView;

/// Longer than anything here takes, however busy the machine is.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn names_cannot_break_out_of_the_page() {
    assert_eq!(escape("<a href='x'>&\""), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;");
}

/// Answers with how many incidents it was asked for; counts how many requests read at once.
#[derive(Default)]
struct Counting {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl IncidentSource for Counting {
    fn list(&self, most: usize) -> Result<String, String> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(20));
        self.now.fetch_sub(1, Ordering::SeqCst);
        Ok(most.to_string())
    }

    fn incident(&self, _: &str) -> Result<Option<String>, String> {
        Ok(None)
    }

    fn newest(&self, _: usize) -> Result<Vec<Incident>, String> {
        Ok(Vec::new())
    }

    fn kills(&self, most: u64) -> Result<Vec<u8>, String> {
        Ok(format!("kills {most}").into_bytes())
    }

    fn sigkills(&self, _: u64) -> Result<Vec<u8>, String> {
        Err("no ledger".to_owned())
    }
}

/// A server with a loop behind it that has so many processes, and what that loop was asked.
struct Trial {
    address: SocketAddr,
    /// Where its `socket` is.
    dir: tempfile::TempDir,
    counts: Arc<ServerCounts>,
    source: Arc<Counting>,
    asked: Arc<Mutex<Vec<&'static str>>>,
}

/// Starts it; with `answers` off the loop takes requests and never answers.
fn trial(limits: ServerLimits, processes: usize, answers: bool) -> Trial {
    trial_with(limits, processes, answers, None)
}

/// The same with a token.
fn trial_with(limits: ServerLimits, processes: usize, answers: bool, token: Option<&str>) -> Trial {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, mut requests) = mpsc::channel(4);
    let source = Arc::new(Counting::default());
    let incidents: Arc<dyn IncidentSource> = Arc::clone(&source) as _;
    let token = token.map(|text| Token::new(text).unwrap());
    let state = AppState::new(sender, incidents, HostNames::default(), token, limits).unwrap();
    let (counts, asked) = (Arc::clone(&state.counts), Arc::new(Mutex::new(Vec::new())));
    let heard = Arc::clone(&asked);
    std::thread::spawn(move || {
        let mut unanswered = Vec::new();
        while let Some(request) = requests.blocking_recv() {
            if !answers {
                unanswered.push(request);
                continue;
            }
            // Noted before it is answered: who has the answer may look.
            let note = |what| heard.lock().unwrap().push(what);
            match request {
                LoopRequest::Ping(reply) => {
                    note("ping");
                    reply.send(()).unwrap();
                }
                LoopRequest::Snapshot(reply) => {
                    note("snapshot");
                    let row = |pid| ProcessView { pid, comm: "x".repeat(400), ..ProcessView::default() };
                    let processes = (0..processes as u32).map(row).collect();
                    drop(reply.send(Snapshot { processes, ..Snapshot::default() }));
                }
                LoopRequest::Metrics(reply) => {
                    note("metrics");
                    drop(reply.send(Box::default()));
                }
            }
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    start(Listeners { tcp: Some(listener), socket: Some(socket) }, state).unwrap();
    Trial { address, dir, counts, source, asked }
}

impl Trial {
    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    /// Sends these bytes and reads until the server closes the connection.
    fn exchange(&self, bytes: &str) -> String {
        let mut stream = self.connect();
        // The server may refuse it before all is sent.
        let _ = stream.write_all(bytes.as_bytes());
        rest(&mut stream)
    }

    fn get(&self, path: &str) -> String {
        self.exchange(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
    }

    /// Asks at the unix socket, as a client that does not care about hosts.
    fn get_local(&self, path: &str) -> String {
        let mut stream = UnixStream::connect(self.dir.path().join("socket")).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: any.example\r\nConnection: close\r\n\r\n").unwrap();
        rest(&mut stream)
    }

    fn refused(&self, reason: &str) -> u64 {
        self.counts.refused().into_iter().find(|(name, _)| *name == reason).unwrap().1
    }

    fn count(&self, outcome: &str) -> u64 {
        self.counts.by_outcome().into_iter().find(|(name, _)| *name == outcome).unwrap().1
    }
}

/// Everything until the server closes the connection, also when it does so hard.
fn rest(stream: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn lists_are_limited_and_read_one_at_a_time_and_readiness_is_a_ping() {
    let trial = trial(ServerLimits::default(), 0, true);
    for (path, end) in [
        ("/api/incidents", "\r\n\r\n200"),
        ("/api/incidents?limit=3", "\r\n\r\n3"),
        ("/api/kills", "\r\n\r\nkills 4194304"),
        ("/api/incidents?limit=0", "\r\n\r\n0"),
        ("/api/incidents?limit=100000", "\r\n\r\n1000"),
    ] {
        let answer = trial.get(path);
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(end), "{path}: {answer}");
    }
    assert!(trial.get("/api/incidents?limit=x").starts_with("HTTP/1.1 400"));
    assert!(trial.get("/api/incidents/none").starts_with("HTTP/1.1 404"));
    assert!(trial.get("/api/sigkills").starts_with("HTTP/1.1 500"));
    std::thread::scope(|scope| {
        let together: Vec<_> = (0..8).map(|_| scope.spawn(|| trial.get("/api/incidents"))).collect();
        for answer in together {
            assert!(answer.join().unwrap().starts_with("HTTP/1.1 200"));
        }
    });
    assert_eq!(trial.source.most.load(Ordering::SeqCst), 1);
    assert!(trial.get("/readyz").ends_with("ready\n"));
    assert_eq!(*trial.asked.lock().unwrap(), ["ping"]);
}

#[test]
fn every_answer_tells_a_browser_to_do_nothing_with_it_and_foreign_hosts_get_none() {
    let trial = trial(ServerLimits::default(), 0, true);
    for path in ["/", "/healthz", "/api/processes", "/metrics", "/none"] {
        let answer = trial.get(path).to_ascii_lowercase();
        for header in ["x-content-type-options: nosniff", "content-security-policy: default-src 'none'", "no-store"] {
            assert!(answer.contains(header), "{path} lacks {header}: {answer}");
        }
    }
    for (head, status) in [
        ("GET /api/processes HTTP/1.1\r\nHost: evil.example\r\n", 421),
        ("GET /healthz HTTP/1.1\r\nHost: evil.example\r\n", 421),
        ("GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n", 421),
        ("GET /healthz HTTP/1.1\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nHost: [::1]:9469\r\n", 200),
        ("GET /healthz HTTP/1.0\r\n", 200),
    ] {
        let answer = trial.exchange(&format!("{head}Connection: close\r\n\r\n"));
        assert!(answer.split(' ').nth(1) == Some(&status.to_string()), "{head}: {answer}");
        assert!(status == 200 || !answer.contains("ok\n"), "{answer}");
    }
}

#[test]
fn a_head_is_bounded_in_bytes_and_time() {
    let limits = ServerLimits { head_time: Duration::from_secs(1), ..ServerLimits::default() };
    let trial = trial(limits, 0, true);
    let long = format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\nx: {}\r\n\r\n", "y".repeat(40 << 10));
    let answer = trial.exchange(&long);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    // A head that never ends, and a connection that asks no more: the server ends both.
    assert!(!trial.exchange("GET /healthz HTTP/1.1\r\nHost: local").contains("200"));
    let idle = trial.exchange("GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(idle.ends_with("ok\n"), "{idle}");
}

#[test]
fn requests_that_are_none_and_bodies_without_end_cost_their_own_connection_only() {
    let trial = trial(ServerLimits { exchange_time: Duration::from_secs(2), ..ServerLimits::default() }, 0, true);
    for (request, status) in [
        ("POST /api/incidents HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n", 405),
        ("DELETE /api/incidents/latest HTTP/1.1\r\nHost: localhost\r\n", 405),
        ("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n", 404),
        ("CONNECT localhost:22 HTTP/1.1\r\nHost: localhost:22\r\n", 404),
        ("GET /api/incidents/%00 HTTP/1.1\r\nHost: localhost\r\n", 404),
        ("GET /api/incidents/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\n", 404),
        ("GET /api/incidents/%ff HTTP/1.1\r\nHost: localhost\r\n", 400),
        ("GET /api/incidents HTTP/9.9\r\nHost: localhost\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n", 400),
        ("\0\u{1}\u{ff}\r\n", 400),
    ] {
        let answer = trial.exchange(&format!("{request}Connection: close\r\n\r\n"));
        let answered = answer.split(' ').nth(1).unwrap_or_default();
        assert!(answered == status.to_string(), "{request}: {answer}");
    }
    // Bodies are not read: what is sent on is neither kept nor answered.
    for length in ["Content-Length: 100000000000", "Transfer-Encoding: chunked"] {
        let mut stream = trial.connect();
        stream.set_write_timeout(Some(LONG)).unwrap();
        write!(stream, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n").unwrap();
        let mut sent = 0_usize;
        while sent < 1 << 30 && stream.write_all(&[b'1'; 1 << 16]).is_ok() {
            sent += 1 << 16;
        }
        assert!(sent < 64 << 20, "{length}: {sent} bytes were taken");
    }
    // Thousands of requests in a row whose answers nobody reads.
    let mut deaf = trial.connect();
    deaf.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let many = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(20_000);
    let _ = deaf.write_all(many.as_bytes());
    assert!(trial.get("/healthz").ends_with("ok\n"));
    assert!(trial.get_local("/api/kills").contains("kills"));
}

#[test]
fn who_opens_many_connections_keeps_nobody_out() {
    let trial = trial(ServerLimits { connections: 4, head_time: LONG * 2, ..ServerLimits::default() }, 0, true);
    let mut many: Vec<TcpStream> = (0..40).map(|_| trial.connect()).collect();
    for _ in 0..3 {
        assert!(trial.get("/healthz").ends_with("ok\n"));
    }
    assert!(rest(&mut many[0]).is_empty(), "the first is closed");
    assert!(trial.count("crowded_out") >= 36, "{:?}", trial.counts);
    assert_eq!(trial.count("accepted"), 43);
    assert!(trial.get("/metrics").contains("memtrace_http_connections_total{outcome=\"crowded_out\"}"));
}

#[test]
fn a_token_is_asked_for_over_tcp_and_not_at_the_socket() {
    let trial = trial_with(ServerLimits::default(), 3, true, Some("0123456789abcdef"));
    let with = |path: &str, token: &str| {
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        trial.exchange(&format!("{head}Authorization: Bearer {token}\r\n\r\n"))
    };
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert!(
            trial.get(path).starts_with("HTTP/1.1 200") && with(path, "wrong").starts_with("HTTP/1.1 200"),
            "{path}"
        );
    }
    for path in ["/", "/api/incidents", "/api/processes", "/none"] {
        let answer = trial.get(path).to_ascii_lowercase();
        assert!(answer.starts_with("http/1.1 401") && answer.contains("www-authenticate: basic "), "{path}: {answer}");
        assert!(answer.contains("nosniff") && !answer.contains("\"pid\""), "{path}: {answer}");
        assert!(with(path, "0123456789abcdeX").starts_with("HTTP/1.1 401"), "{path}");
        let right = if path == "/none" { "HTTP/1.1 404" } else { "HTTP/1.1 200" };
        assert!(with(path, "0123456789abcdef").starts_with(right), "{path}");
        assert!(trial.get_local(path).starts_with(right), "{path}");
    }
    assert_eq!((trial.refused("no_token"), trial.refused("wrong_token")), (4, 4));
    let line = "memtrace_http_refused_total{reason=\"wrong_token\"} 4";
    assert!(trial.get("/metrics").contains(line));
}

#[test]
fn clients_of_tcp_and_of_the_socket_do_not_keep_each_other_out() {
    let limits = ServerLimits { connections: 8, head_time: LONG * 2, ..ServerLimits::default() };
    let trial = trial(limits, 0, true);
    let mut local = UnixStream::connect(trial.dir.path().join("socket")).unwrap();
    local.set_read_timeout(Some(LONG)).unwrap();
    let mut remote = trial.connect();
    let ask = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut answer = [0; 12];
    // Both are served, then each door is crowded by others; the other's client is still there.
    local.write_all(ask).unwrap();
    local.read_exact(&mut answer).unwrap();
    let many: Vec<TcpStream> = (0..40).map(|_| trial.connect()).collect();
    assert!(trial.get("/healthz").ends_with("ok\n"));
    drop(many);
    local.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    assert!(rest(&mut local).ends_with("ok\n"), "it was closed for clients of TCP");
    assert!(rest(&mut remote).is_empty(), "the first of TCP is closed");
    let mut remote = trial.connect();
    remote.write_all(ask).unwrap();
    remote.read_exact(&mut answer).unwrap();
    let path = trial.dir.path().join("socket");
    let many: Vec<UnixStream> = (0..40).map(|_| UnixStream::connect(&path).unwrap()).collect();
    assert!(trial.get_local("/healthz").ends_with("ok\n"));
    drop(many);
    remote.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    assert!(rest(&mut remote).ends_with("ok\n"), "it was closed for clients of the socket");
}

#[test]
fn an_exchange_that_takes_too_long_is_ended() {
    let limits = ServerLimits { exchange_time: Duration::from_millis(100), ..ServerLimits::default() };
    let trial = trial(limits, 60_000, true);
    let mut slow = trial.connect();
    slow.write_all(b"GET /api/processes HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let deadline = Instant::now() + LONG;
    while trial.count("timed_out") == 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let read = rest(&mut slow).len();
    assert!(trial.count("timed_out") == 1 && read < 20 << 20, "{read} bytes; {:?}", trial.counts);
}

#[test]
fn what_is_large_is_asked_for_once_by_many_and_what_is_small_each_time() {
    for processes in [4000, 10] {
        let trial = trial(ServerLimits::default(), processes, true);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for path in ["/api/processes", "/api/processes", "/api/processes?pid=7"].repeat(2) {
                let trial = &trial;
                scope.spawn(move || assert!(trial.get(path).contains("\"pid\":7")));
            }
        });
        let asked = trial.asked.lock().unwrap().len();
        // One in each second that began while they asked.
        let at_most = usize::try_from(begun.elapsed().as_secs()).unwrap() + 2;
        let right = if processes == 10 { asked == 6 } else { asked <= at_most };
        assert!(right, "{asked} snapshots of {processes} processes, at most {at_most}");
    }
}

#[test]
fn health_answers_while_the_loop_does_not() {
    let trial = trial(ServerLimits { loop_time: Duration::from_secs(1), ..ServerLimits::default() }, 0, false);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| trial.get("/readyz"));
        for _ in 0..10 {
            assert!(trial.get("/healthz").ends_with("ok\n"));
        }
        let answer = waits.join().unwrap();
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("did not answer in time"), "{answer}");
    });
}
