//! The server as its clients see it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
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
}

/// A server with a loop behind it that has so many processes, and what that loop was asked.
struct Trial {
    address: SocketAddr,
    counts: Arc<ServerCounts>,
    source: Arc<Counting>,
    asked: Arc<Mutex<Vec<&'static str>>>,
}

/// Starts it; with `answers` off the loop takes requests and never answers.
fn trial(limits: ServerLimits, processes: usize, answers: bool) -> Trial {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, mut requests) = mpsc::channel(4);
    let source = Arc::new(Counting::default());
    let incidents: Arc<dyn IncidentSource> = Arc::clone(&source) as _;
    let state = AppState::new(sender, incidents, HostNames::default(), limits).unwrap();
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
    start(listener, state).unwrap();
    Trial { address, counts, source, asked }
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

    fn count(&self, outcome: &str) -> u64 {
        self.counts.by_outcome().into_iter().find(|(name, _)| *name == outcome).unwrap().1
    }
}

/// Everything until the server closes the connection, also when it does so hard.
fn rest(stream: &mut TcpStream) -> String {
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
        ("/api/incidents?limit=0", "\r\n\r\n0"),
        ("/api/incidents?limit=100000", "\r\n\r\n1000"),
    ] {
        let answer = trial.get(path);
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(end), "{path}: {answer}");
    }
    assert!(trial.get("/api/incidents?limit=x").starts_with("HTTP/1.1 400"));
    assert!(trial.get("/api/incidents/none").starts_with("HTTP/1.1 404"));
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
