//! The page of an incident in a real browser: its figures add up, and names full of markup are
//! shown as text.

#![allow(clippy::indexing_slicing, reason = "a panic is how a test fails")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use fantoccini::actions::{InputSource as _, MOUSE_BUTTON_LEFT, MouseActions, PointerAction};
use fantoccini::elements::Element;
use fantoccini::key::Key;
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use memtrace_tests::{programs, sample};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Far longer than a browser takes to react; only a page that hangs gets there.
const DEADLINE: Duration = Duration::from_secs(30);

const FLAGS: [&str; 9] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
];

const IMAGE: &str = "<img src=x onerror=\"window.__owned=1\">";
const SCRIPT: &str = "</script><script>window.__owned=1;alert(1)</script><!--";
const TERMINAL: &str = "\"'`\u{1b}]0;owned\u{7}\u{202e}\u{2028}&lt;b&gt;{{7*7}}${window.__owned=1}";

/// Bytes of each sample and its path: two touch, one maps, one has no stack, one names a path that
/// does not exist.
const TURNS: [(Option<u32>, u64); 5] =
    [(Some(0), 524_288), (Some(1), 131_072), (Some(2), 1_048_576), (None, 4096), (Some(99), 8192)];

const FROM_NS: u64 = 8_000_000_000;
const STEP_NS: u64 = 2_500_001;
const SAMPLES: u64 = 400;

/// (when, path, bytes), oldest first.
fn samples() -> Vec<(u64, Option<u32>, u64)> {
    let turns = TURNS.iter().cycle().zip(0..SAMPLES);
    turns.map(|((path, bytes), i)| (FROM_NS + i * STEP_NS, *path, bytes + i)).collect()
}

fn frame(symbol: &str, kernel: bool) -> Value {
    json!({
        "module": if kernel { Value::Null } else { json!(format!("/opt/{IMAGE}/{SCRIPT}")) }, "build_id": "c0ffee",
        "offset": 4660, "symbol": symbol, "file": format!("src/{TERMINAL}.rs"), "line": 7, "inlined": false,
        "kernel": kernel,
    })
}

/// An incident in which every name contains markup.
fn hostile() -> Value {
    let mut incident = sample::incident();
    let process = json!({ "pid": 4242, "tid": 4242, "start_boot_ns": 5_000_000_000_u64, "comm": IMAGE });
    let other = json!({ "pid": 4243, "tid": 4243, "start_boot_ns": 5_000_000_001_u64, "comm": SCRIPT });
    let path = |cause: &str, process: &Value, innermost: &str| {
        let mut nameless = frame("", false);
        nameless["symbol"] = Value::Null;
        json!({
            "weight_bytes": 1, "cause": cause, "process": process, "cut": null, "mapped_by": null,
            "frames": [frame("do_anonymous_page", true), frame(innermost, false), nameless, frame(SCRIPT, false),
                frame(TERMINAL, false), frame("main", false)],
        })
    };
    incident["allocation_paths"] =
        json!([path("touch", &process, "needle"), path("touch", &other, IMAGE), path("map", &process, "mapper"),]);
    let rows = samples();
    incident["allocations"] = json!({
        "growth_bytes": 1, "attributed_bytes": 1, "unattributed": [{ "why": SCRIPT, "bytes": 4096 }],
        "sample_bytes": 131_072, "thinned": 1, "joined": 1,
        "samples": {
            "boot_ns": rows.iter().map(|row| row.0).collect::<Vec<_>>(),
            "path": rows.iter().map(|row| row.1).collect::<Vec<_>>(),
            "weight_bytes": rows.iter().map(|row| row.2).collect::<Vec<_>>(),
        },
    });
    for at in ["/cgroup/path", "/oom/victims/0/comm", "/oom/victims/0/cgroup_path", "/host/hostname", "/at/wall"] {
        *incident.pointer_mut(at).unwrap_or(&mut Value::Null) = json!(format!("{IMAGE}{SCRIPT}{TERMINAL}"));
    }
    incident["cgroup"]["container"] = json!({ "id": SCRIPT, "runtime": IMAGE });
    incident["verdict"] = json!({ "summary": SCRIPT, "evidence": [IMAGE, TERMINAL] });
    incident["losses"] = json!([{ "what": SCRIPT, "count": 3 }]);
    incident
}

/// Growth from `from_ns` to `until_ns`: (with a stack, without, mapped address space).
fn grown(from_ns: u64, until_ns: u64) -> (u64, u64, u64) {
    let within = samples().into_iter().filter(|(ns, ..)| (from_ns..=until_ns).contains(ns));
    within.fold((0, 0, 0), |(with, without, mapped), (_, path, bytes)| match path {
        Some(0 | 1) => (with + bytes, without, mapped),
        Some(2) => (with, without, mapped + bytes),
        _ => (with, without + bytes, mapped),
    })
}

/// The page that `memtrace report` writes for an incident.
fn page_of(dir: &Path, incident: &Value) -> anyhow::Result<PathBuf> {
    let (file, page) = (dir.join("one.memtrace"), dir.join("page.html"));
    std::fs::write(&file, zstd::encode_all(serde_json::to_vec(incident)?.as_slice(), 3)?)?;
    let mut command = programs::memtrace_command()?;
    let output = command.arg("report").arg(&file).args(["--format", "html", "-o"]).arg(&page).output()?;
    ensure!(output.status.success(), "report failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(page)
}

/// Chromium and chromedriver, with a temporary profile.
struct Browser {
    driver: Child,
    port: u16,
    _profile: TempDir,
    client: Client,
}

impl Browser {
    async fn open(page: &Path) -> anyhow::Result<Self> {
        let missing = "is it installed? `cargo xtask setup --tests` does that";
        let chromium = Command::new("chromium").arg("--version").output();
        ensure!(chromium.is_ok_and(|output| output.status.success()), "chromium does not run; {missing}");
        let mut command = Command::new("chromedriver");
        let driver = command.arg("--port=0").stdout(Stdio::piped()).spawn();
        let mut driver = driver.with_context(|| format!("chromedriver does not run; {missing}"))?;
        let stdout = driver.stdout.take().context("chromedriver has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let port = loop {
            let line = lines.next().context("chromedriver ended without saying its port")??;
            if let Some((_, said)) = line.split_once("successfully on port ") {
                break said.trim_end_matches('.').parse()?;
            }
        };
        // its other output must not fill the pipe
        std::thread::spawn(move || lines.for_each(drop));
        let profile = tempfile::tempdir()?;
        let mut flags: Vec<String> = FLAGS.map(str::to_owned).to_vec();
        flags.push(format!("--user-data-dir={}", profile.path().display()));
        flags.push("--window-size=1280,1600".to_owned());
        let wishes = json!({
            "goog:chromeOptions": { "args": flags }, "goog:loggingPrefs": { "browser": "ALL" },
            "unhandledPromptBehavior": "ignore",
        });
        let Value::Object(wishes) = wishes else { bail!("capabilities are an object") };
        let connected = ClientBuilder::new(HttpConnector::new())
            .capabilities(wishes)
            .connect(&format!("http://127.0.0.1:{port}"))
            .await;
        let client = match connected {
            Ok(client) => client,
            Err(error) => {
                driver.kill()?;
                return Err(error).context("chromium did not start");
            }
        };
        let browser = Self { driver, port, _profile: profile, client };
        browser.client.goto(&format!("file://{}", page.display())).await?;
        Ok(browser)
    }

    async fn close(mut self) -> anyhow::Result<()> {
        let closed = tokio::time::timeout(DEADLINE, self.client.close()).await;
        self.driver.kill()?;
        self.driver.wait()?;
        Ok(closed.context("the browser does not close")??)
    }

    async fn find(&self, css: &str) -> anyhow::Result<Element> {
        self.client.find(Locator::Css(css)).await.with_context(|| format!("the page has no {css}"))
    }

    async fn run(&self, script: &str) -> anyhow::Result<Value> {
        self.client.execute(script, Vec::new()).await.with_context(|| format!("failed to run {script}"))
    }

    /// A figure that the page keeps in a `data-` attribute.
    async fn figure(&self, css: &str, name: &str) -> anyhow::Result<u64> {
        let text = self.find(css).await?.attr(name).await?.with_context(|| format!("{css} has no {name}"))?;
        text.parse().with_context(|| format!("{css} {name} is {text:?}"))
    }

    /// Waits until a figure is `wanted`.
    async fn becomes(&self, css: &str, name: &str, wanted: u64) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            let is = self.figure(css, name).await?;
            if is == wanted {
                return Ok(());
            }
            ensure!(start.elapsed() < DEADLINE, "{css} {name} is {is}, not {wanted}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Drags over the curve, from and to hundredths of its width.
    async fn brush(&self, from: f64, to: f64) -> anyhow::Result<()> {
        let curve = self.find("#curve .u-over").await?;
        let (_, _, width, _) = curve.rectangle().await?;
        // Offsets are from the middle.
        let go = |percent: f64| PointerAction::MoveToElement {
            element: curve.clone(),
            duration: Some(Duration::from_millis(50)),
            x: ((percent / 100.0 - 0.5) * width).round(),
            y: 0.0,
        };
        let drag = MouseActions::new("mouse".to_owned())
            .then(go(from))
            .then(PointerAction::Down { button: MOUSE_BUTTON_LEFT })
            .then(go(f64::midpoint(from, to)))
            .then(go(to))
            .then(PointerAction::Up { button: MOUSE_BUTTON_LEFT });
        Ok(self.client.perform_actions(drag).await?)
    }

    /// Entries of the browser console with their levels; reading empties it. fantoccini has no call
    /// for this.
    async fn console(&self) -> anyhow::Result<Vec<String>> {
        let session = self.client.session_id().await?.context("no session")?;
        let body = r#"{"type":"browser"}"#;
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        write!(
            stream,
            "POST /session/{session}/se/log HTTP/1.1\r\nHost: localhost:{}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.port,
            body.len()
        )?;
        // chromedriver keeps the connection open, so the response is read by its Content-Length
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut reader = BufReader::new(stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let line = line.trim().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(said) = line.strip_prefix("content-length:") {
                length = said.trim().parse()?;
            }
        }
        let mut answer = vec![0; length];
        reader.read_exact(&mut answer)?;
        let json: Value = serde_json::from_slice(&answer).context("chromedriver's answer is not JSON")?;
        let entries = json["value"].as_array().with_context(|| format!("chromedriver said {json}"))?;
        Ok(entries.iter().map(|entry| format!("{} {}", entry["level"], entry["message"])).collect())
    }
}

/// Opens a page, runs `work` and closes the browser, also after an error.
fn in_browser(page: &Path, body: impl AsyncFnOnce(&Browser) -> anyhow::Result<()>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let browser = Browser::open(page).await?;
        let result =
            tokio::time::timeout(4 * DEADLINE, body(&browser)).await.unwrap_or_else(|_| bail!("the page is stuck"));
        let closed = browser.close().await;
        result.and(closed)
    })
}

/// The page's totals are those of the samples in the stretch that it says it shows.
async fn adds_up(browser: &Browser) -> anyhow::Result<(u64, u64)> {
    let from = browser.figure("#stretch", "data-from-ns").await?;
    let until = browser.figure("#stretch", "data-until-ns").await?;
    let (with, without, _) = grown(from, until);
    let shown = [
        browser.figure("#stretch", "data-growth-bytes").await?,
        browser.figure("#stretch", "data-attributed-bytes").await?,
        browser.figure("#stretch", "data-unattributed-bytes").await?,
        browser.figure("#flame", "data-total-bytes").await?,
    ];
    ensure!(shown == [with + without, with, without, with + without], "from {from} to {until}: {shown:?}");
    Ok((from, until))
}

async fn nothing_ran(browser: &Browser) -> anyhow::Result<()> {
    let foreign = browser.run("return document.querySelectorAll('img, iframe, object, embed, link, b').length").await?;
    ensure!(foreign == json!(0), "{foreign} elements that are not the page's");
    let scripts =
        browser.run("return [document.scripts.length, [...document.scripts].filter(s => s.src).length]").await?;
    ensure!(scripts == json!([8, 0]), "scripts: {scripts}");
    ensure!(browser.run("return typeof window.__owned").await? == json!("undefined"), "a name was run");
    ensure!(browser.client.get_alert_text().await.is_err(), "a name opened a dialogue");
    let requests = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)").await?;
    ensure!(requests == json!([]), "the page asked for {requests}");
    let said = browser.console().await?;
    ensure!(said.is_empty(), "the console says {said:?}");
    // an error would be in the console
    browser.run("console.error('heard')").await?;
    ensure!(browser.console().await?.iter().any(|line| line.contains("heard")), "the console cannot be read");
    Ok(())
}

#[test]
fn a_brushed_stretch_is_weighed_by_its_samples() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let page = page_of(dir.path(), &hostile())?;
    in_browser(&page, async |browser| {
        let whole = adds_up(browser).await?;
        let (with, without, mapped) = grown(0, u64::MAX);
        browser.becomes("#flame", "data-total-bytes", with + without).await?;

        browser.brush(30.0, 60.0).await?;
        let brushed = adds_up(browser).await?;
        ensure!(brushed.0 > whole.0 && brushed.1 < whole.1, "brushing did not narrow {whole:?}: {brushed:?}");
        let share = (brushed.1 - brushed.0) as f64 / (whole.1 - whole.0) as f64;
        ensure!((0.2..0.4).contains(&share), "30 % of the curve's width are {share} of its time");
        let part = grown(brushed.0, brushed.1);
        ensure!(part.0 > 0 && part.1 > 0 && part.0 < with, "the stretch has {part:?} of {with}");

        browser.find("#cause").await?.select_by_value("map").await?;
        browser.becomes("#flame", "data-total-bytes", part.2).await?;
        browser.find("[data-last-ns=all]").await?.click().await?;
        browser.becomes("#flame", "data-total-bytes", mapped).await?;
        browser.find("#cause").await?.select_by_value("touch").await?;
        browser.becomes("#flame", "data-total-bytes", with + without).await?;
        ensure!(adds_up(browser).await? == whole, "the whole is not the whole again");

        browser.find("[data-last-ns=\"100000000\"]").await?.click().await?;
        let last = adds_up(browser).await?;
        ensure!(last.1 - last.0 == 100_000_000, "the last 100 ms are {last:?}");
        nothing_ran(browser).await
    })
}

#[test]
fn frames_are_zoomed_into_searched_and_turned_around() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let page = page_of(dir.path(), &hostile())?;
    let of_path = |index| samples().iter().filter(|row| row.1 == Some(index)).map(|row| row.2).sum::<u64>();
    in_browser(&page, async |browser| {
        let whole = browser.figure("#flame", "data-total-bytes").await?;
        browser.find(".box[aria-label^='needle,']").await?.click().await?;
        browser.becomes("#flame", "data-zoomed-bytes", of_path(0)).await?;
        ensure!(browser.find("#details").await?.text().await?.contains("c0ffee"), "no build id of the frame");
        let crumbs = browser.client.find_all(Locator::Css("#crumbs button")).await?.len();
        browser.client.active_element().await?.send_keys(&Key::Escape.to_string()).await?;
        let fewer = browser.client.find_all(Locator::Css("#crumbs button")).await?.len();
        ensure!(fewer + 1 == crumbs, "Escape left {fewer} of {crumbs} crumbs");
        browser.find("#crumbs button").await?.click().await?;
        browser.becomes("#flame", "data-zoomed-bytes", whole).await?;

        browser.find("#search").await?.send_keys("needle").await?;
        browser.becomes("#matched", "data-bytes", of_path(0)).await?;
        ensure!(browser.client.find_all(Locator::Css(".box.match")).await?.len() == 1, "one frame has that name");
        browser.find("#search").await?.clear().await?;

        browser.find("#inverted").await?.click().await?;
        browser.becomes("#flame", "data-total-bytes", whole).await?;
        browser.find(".box.kernel[aria-level='2'][aria-label^='do_anonymous_page,']").await?;
        browser.find("#kernel").await?.click().await?;
        let needle = browser.find(".box.user[aria-level='2'][aria-label^='needle,']").await?;
        ensure!(needle.attr("data-bytes").await? == Some(of_path(0).to_string()), "innermost first lost bytes");

        browser.find("#process").await?.select_by_index(2).await?;
        browser.becomes("#flame", "data-total-bytes", of_path(1)).await?;
        browser.client.set_window_size(360, 800).await?;
        let fits = "const all = document.querySelector('#curve');
            return all.querySelector('.uplot').offsetWidth <= all.clientWidth";
        let start = Instant::now();
        while browser.run(fits).await? != json!(true) {
            ensure!(start.elapsed() < DEADLINE, "the curve stays wider than its place");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // tables scroll in boxes of their own; the page does not scroll sideways
        let wide = browser.run("return document.documentElement.scrollWidth - innerWidth").await?;
        ensure!(wide.as_i64().is_some_and(|wide| wide <= 0), "{wide} px too wide for a phone");
        nothing_ran(browser).await
    })
}

/// The page writes figures by the rule of `memtrace_incident::units`, whose tests read the same cases.
#[test]
fn figures_are_written_as_in_the_text_report() -> anyhow::Result<()> {
    let cases: Value = serde_json::from_str(include_str!("../../memtrace-incident/src/units_cases.json"))?;
    let dir = tempfile::tempdir()?;
    let page = page_of(dir.path(), &sample::incident())?;
    in_browser(&page, async |browser| {
        for (function, cases) in cases.as_object().context("cases are by function")? {
            for case in cases.as_array().context("cases are a list")? {
                let [arguments @ .., wanted] = case.as_array().context("a case is a list")?.as_slice() else {
                    bail!("an empty case of {function}")
                };
                let script = format!("return {function}(...{}).replaceAll('\\u00a0', ' ')", json!(arguments));
                let written = browser.run(&script).await?;
                ensure!(written == *wanted, "{function} {arguments:?} is {written}, not {wanted}");
            }
        }
        Ok(())
    })
}

#[test]
fn a_file_without_stacks_or_readings_is_still_shown() -> anyhow::Result<()> {
    let mut bare = sample::incident();
    for column in
        ["boot_ns", "usage_bytes", "limit_bytes", "watermark_bytes", "anon_bytes", "file_bytes", "shmem_bytes"]
            .into_iter()
            .chain(["swap_bytes", "swap_usage_bytes", "swap_limit_bytes"])
    {
        bare["timeline"]["columns"][column] = json!([]);
    }
    let dir = tempfile::tempdir()?;
    let page = page_of(dir.path(), &bare)?;
    in_browser(&page, async |browser| {
        let text = browser.find("body").await?.text().await?;
        for words in ["workload (pid 4242) killed", "workload reached its limit.", "no readings of the curve"] {
            ensure!(text.contains(words), "the page does not say {words:?}:\n{text}");
        }
        ensure!(browser.find("#stretch").await?.attr("data-growth-bytes").await?.as_deref() == Some(""), "not unknown");
        nothing_ran(browser).await
    })
}
