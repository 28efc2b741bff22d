//! A CNI configuration made from a template and the node's pod network.
//!
//! The templates are those of containerd's `conf_template`, in this part of Go's
//! text/template:
//!
//! ```text
//! {{.PodCIDR}} {{.PodCIDRRanges}} {{.Routes}}   the first subnet, all of them, a default route for each family
//! {{.}} {{$}} {{$name}} {{$.PodCIDR}}           what the range is at, the data, a variable
//! {{len X}} {{index X 0}}                       of a list
//! {{if X}} {{else if X}} {{else}} {{end}}       an empty list, an empty string and 0 are false; also {{if not X}}
//! {{range X}} {{range $v := X}} {{range $i, $v := X}} {{else}} {{end}}
//! {{- X -}}                                     without the white space before and after
//! {{/* a comment */}}
//! ```
//! Pipes, `with`, `define`, `template`, `block`, `break`, `continue`, assignments
//! outside `range` and every other function are refused by name.
//!
//! Source: Go, package text/template; containerd, `docs/cri/config.md`, "CNI
//! Config Template".

use crate::address::IpNet;
use std::fmt::Write as _;

/// Largest template that is rendered, and the most it may become, in bytes.
const MAX_BYTES: usize = 1 << 20;

/// How deep `if` and `range` may be in each other.
const MAX_DEPTH: usize = 64;

/// How many actions one rendering may carry out: ranges within ranges multiply.
const MAX_STEPS: usize = 1 << 20;

/// What is wrong with a template, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct TemplateError {
    /// From 1.
    pub line: usize,
    /// What is wrong.
    pub why: String,
}

/// What `template` becomes for the subnets `cidrs`, in their order.
///
/// # Errors
/// What is not supported, does not fit, or grows without bounds.
pub fn render(template: &str, cidrs: &[IpNet]) -> Result<String, TemplateError> {
    if template.len() > MAX_BYTES {
        return Err(at(
            1,
            format!("the template is longer than {MAX_BYTES} bytes"),
        ));
    }
    let tokens = tokens(template)?;
    let mut parser = Parser {
        tokens: &tokens,
        next: 0,
    };
    let (nodes, end) = parser.block(0)?;
    if let Some((line, word)) = end {
        return Err(at(line, format!("{word} without its beginning")));
    }
    let ranges: Vec<Data> = cidrs
        .iter()
        .map(|cidr| Data::Text(cidr.to_string()))
        .collect();
    let routes = [(true, "0.0.0.0/0"), (false, "::/0")]
        .into_iter()
        .filter(|(ipv4, _)| cidrs.iter().any(|cidr| cidr.is_ipv4() == *ipv4));
    let mut run = Run {
        cidr: ranges.first().cloned().unwrap_or(Data::Text(String::new())),
        ranges: Data::List(ranges),
        routes: Data::List(routes.map(|(_, dst)| Data::Text(dst.into())).collect()),
        variables: Vec::new(),
        steps: 0,
        out: String::new(),
    };
    run.all(&nodes, &Dot::Data)?;
    Ok(run.out)
}

fn at(line: usize, why: impl Into<String>) -> TemplateError {
    TemplateError {
        line,
        why: why.into(),
    }
}

enum Token<'a> {
    Text(&'a str),
    /// What is between the braces, and its line.
    Action(usize, &'a str),
}

fn tokens(template: &str) -> Result<Vec<Token<'_>>, TemplateError> {
    let mut tokens = Vec::new();
    let mut rest = template;
    let lines = |text: &str| text.bytes().filter(|b| *b == b'\n').count();
    let mut number = 1;
    let mut trim = false;
    loop {
        let (text, after) = match rest.find("{{") {
            Some(begin) => (&rest[..begin], Some(&rest[begin..])),
            None => (rest, None),
        };
        number += lines(text);
        let text = if trim { text.trim_start() } else { text };
        let Some(action) = after else {
            tokens.push(Token::Text(text));
            return Ok(tokens);
        };
        let (inner, trims) = match action[2..].strip_prefix('-') {
            Some(inner) if inner.starts_with(char::is_whitespace) => (inner, true),
            _ => (&action[2..], false),
        };
        tokens.push(Token::Text(if trims { text.trim_end() } else { text }));
        let comment = inner.trim_start().starts_with("/*");
        let end = match comment {
            true => inner.find("*/").map(|end| end + 2),
            false => Some(0),
        };
        let end = end.and_then(|from| Some(from + inner[from..].find("}}")?));
        let Some(end) = end else {
            return Err(at(number, "{{ without }}"));
        };
        let mut body = &inner[..end];
        trim = false;
        if let Some(before) = body.strip_suffix('-')
            && before.ends_with(char::is_whitespace)
        {
            (body, trim) = (before, true);
        }
        let body = body.trim();
        if comment {
            if !body.ends_with("*/") {
                return Err(at(
                    number,
                    "a comment has more than itself between its braces",
                ));
            }
        } else {
            tokens.push(Token::Action(number, body));
        }
        number += lines(&inner[..end]);
        rest = &inner[end + 2..];
    }
}

enum Node<'a> {
    Text(&'a str),
    Print(usize, Operand<'a>),
    If(usize, Condition<'a>, Vec<Node<'a>>, Vec<Node<'a>>),
    Range(Range<'a>),
}

struct Range<'a> {
    line: usize,
    /// The variables, of the number and of the value.
    names: (Option<&'a str>, Option<&'a str>),
    over: Operand<'a>,
    body: Vec<Node<'a>>,
    otherwise: Vec<Node<'a>>,
}

struct Condition<'a> {
    not: bool,
    operand: Operand<'a>,
}

enum Operand<'a> {
    Dot,
    /// `$`, or what a variable holds.
    Variable(&'a str),
    /// A field of the dot, or of a variable.
    Field(Option<&'a str>, &'a str),
    Len(Box<Operand<'a>>),
    Index(Box<Operand<'a>>, usize),
    Literal(Data),
}

struct Parser<'a> {
    tokens: &'a [Token<'a>],
    next: usize,
}

/// `else…` or `end`, and its line.
type Ending<'a> = Option<(usize, &'a str)>;

impl<'a> Parser<'a> {
    /// Nodes up to an `else` or `end` of this level.
    fn block(&mut self, depth: usize) -> Result<(Vec<Node<'a>>, Ending<'a>), TemplateError> {
        let mut nodes = Vec::new();
        while let Some(token) = self.tokens.get(self.next) {
            self.next += 1;
            let (line, action) = match token {
                Token::Text(text) => {
                    nodes.push(Node::Text(text));
                    continue;
                }
                Token::Action(line, action) => (*line, *action),
            };
            let word = action.split_whitespace().next().unwrap_or_default();
            let rest = action[word.len()..].trim();
            if depth >= MAX_DEPTH && matches!(word, "if" | "range") {
                return Err(at(line, format!("more than {MAX_DEPTH} levels")));
            }
            match word {
                "end" | "else" => return Ok((nodes, Some((line, action)))),
                "if" => nodes.push(self.branch(line, rest, depth)?),
                "range" => nodes.push(self.range(line, rest, depth)?),
                _ => nodes.push(Node::Print(line, operand(line, action)?)),
            }
        }
        Ok((nodes, None))
    }

    fn branch(
        &mut self,
        line: usize,
        condition: &'a str,
        depth: usize,
    ) -> Result<Node<'a>, TemplateError> {
        let (not, text) = match condition.strip_prefix("not ") {
            Some(rest) => (true, rest),
            None => (false, condition),
        };
        let condition = Condition {
            not,
            operand: operand(line, text)?,
        };
        let (body, end) = self.block(depth + 1)?;
        let otherwise = match end {
            Some((_, "end")) => Vec::new(),
            Some((_, "else")) => self.until_end(line, "if", depth)?,
            Some((line, more)) => {
                let again = more.strip_prefix("else").map(str::trim);
                match again.and_then(|again| again.strip_prefix("if ")) {
                    // Its `end` is this one's too.
                    Some(condition) if depth < MAX_DEPTH => {
                        vec![self.branch(line, condition.trim(), depth + 1)?]
                    }
                    Some(_) => return Err(at(line, format!("more than {MAX_DEPTH} levels"))),
                    None => return Err(at(line, format!("{{{{{more}}}}} is not supported"))),
                }
            }
            None => return Err(at(line, "if without end")),
        };
        Ok(Node::If(line, condition, body, otherwise))
    }

    fn range(
        &mut self,
        line: usize,
        text: &'a str,
        depth: usize,
    ) -> Result<Node<'a>, TemplateError> {
        let (names, over) = match text.split_once(":=") {
            None => ((None, None), text),
            Some((names, over)) => {
                let variable = |name: &'a str| {
                    let name = name.trim();
                    if is_variable(name) && name != "$" {
                        Ok(Some(name))
                    } else {
                        Err(at(line, format!("{name} is no variable")))
                    }
                };
                let names = match names.split_once(',') {
                    Some((number, value)) => (variable(number)?, variable(value)?),
                    None => (None, variable(names)?),
                };
                (names, over)
            }
        };
        let over = operand(line, over)?;
        let (body, end) = self.block(depth + 1)?;
        let otherwise = match end {
            Some((_, "end")) => Vec::new(),
            Some((_, "else")) => self.until_end(line, "range", depth)?,
            Some((line, more)) => return Err(at(line, format!("{{{{{more}}}}} is not supported"))),
            None => return Err(at(line, "range without end")),
        };
        Ok(Node::Range(Range {
            line,
            names,
            over,
            body,
            otherwise,
        }))
    }

    fn until_end(
        &mut self,
        line: usize,
        of: &str,
        depth: usize,
    ) -> Result<Vec<Node<'a>>, TemplateError> {
        match self.block(depth + 1)? {
            (nodes, Some((_, "end"))) => Ok(nodes),
            (_, Some((line, word))) => Err(at(line, format!("{word} after else"))),
            (_, None) => Err(at(line, format!("{of} without end"))),
        }
    }
}

fn is_variable(text: &str) -> bool {
    let name = text.strip_prefix('$');
    name.is_some_and(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
}

fn operand(line: usize, text: &str) -> Result<Operand<'_>, TemplateError> {
    let text = text.trim();
    let unsupported = |what: &str| Err(at(line, format!("{{{{{what}}}}} is not supported")));
    if text.contains('|') {
        return unsupported(&format!("{text}: a pipe"));
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    match words[..] {
        [] => Err(at(line, "there is nothing between the braces")),
        ["len", of] => Ok(Operand::Len(Box::new(single(line, of)?))),
        ["index", of, number] => match number.parse() {
            Ok(number) => Ok(Operand::Index(Box::new(single(line, of)?), number)),
            Err(_) => unsupported(text),
        },
        [one] => single(line, one),
        _ => unsupported(text),
    }
}

fn single(line: usize, text: &str) -> Result<Operand<'_>, TemplateError> {
    let unsupported = || Err(at(line, format!("{{{{{text}}}}} is not supported")));
    let known = |field: &str| ["PodCIDR", "PodCIDRRanges", "Routes"].contains(&field);
    if text == "." {
        return Ok(Operand::Dot);
    }
    if let Ok(number) = text.parse::<usize>() {
        return Ok(Operand::Literal(Data::Number(number)));
    }
    if text.len() >= 2
        && let Some(inner) = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'))
        && !inner.contains(['"', '\\'])
    {
        return Ok(Operand::Literal(Data::Text(inner.into())));
    }
    let (variable, field) = match text.split_once('.') {
        None if is_variable(text) => return Ok(Operand::Variable(text)),
        Some(("", field)) => (None, field),
        Some((variable, field)) if is_variable(variable) => (Some(variable), field),
        _ => return unsupported(),
    };
    if known(field) {
        Ok(Operand::Field(variable, field))
    } else {
        let why = format!("there is no .{field}: there are .PodCIDR, .PodCIDRRanges and .Routes");
        Err(at(line, why))
    }
}

#[derive(Clone, Debug)]
enum Data {
    Text(String),
    Number(usize),
    List(Vec<Data>),
}

impl Data {
    fn holds(&self) -> bool {
        match self {
            Data::Text(text) => !text.is_empty(),
            Data::Number(number) => *number != 0,
            Data::List(list) => !list.is_empty(),
        }
    }

    /// As Go's fmt prints it.
    fn print(&self, out: &mut String) {
        match self {
            Data::Text(text) => out.push_str(text),
            Data::Number(number) => _ = write!(out, "{number}"),
            Data::List(list) => {
                out.push('[');
                for (at, item) in list.iter().enumerate() {
                    if at > 0 {
                        out.push(' ');
                    }
                    item.print(out);
                }
                out.push(']');
            }
        }
    }
}

/// What the dot is.
enum Dot {
    /// The whole of what is given.
    Data,
    /// What a range is at.
    Item(Data),
}

struct Run<'a> {
    cidr: Data,
    ranges: Data,
    routes: Data,
    variables: Vec<(&'a str, Data)>,
    steps: usize,
    out: String,
}

impl<'a> Run<'a> {
    fn all(&mut self, nodes: &[Node<'a>], dot: &Dot) -> Result<(), TemplateError> {
        for node in nodes {
            self.steps += 1;
            let line = match node {
                Node::Text(_) => 1,
                Node::Print(line, _) | Node::If(line, ..) => *line,
                Node::Range(range) => range.line,
            };
            if self.steps > MAX_STEPS || self.out.len() > MAX_BYTES {
                return Err(at(line, "what it becomes has no end"));
            }
            match node {
                Node::Text(text) => self.out.push_str(text),
                Node::Print(line, operand) => {
                    let data = self.value(*line, operand, dot)?;
                    data.print(&mut self.out);
                }
                Node::If(line, condition, body, otherwise) => {
                    let holds = self.value(*line, &condition.operand, dot)?.holds();
                    let taken = if holds != condition.not {
                        body
                    } else {
                        otherwise
                    };
                    self.all(taken, dot)?;
                }
                Node::Range(range) => self.range(range, dot)?,
            }
        }
        Ok(())
    }

    fn range(&mut self, range: &Range<'a>, dot: &Dot) -> Result<(), TemplateError> {
        let Data::List(items) = self.value(range.line, &range.over, dot)? else {
            return Err(at(range.line, "range over what is no list"));
        };
        if items.is_empty() {
            return self.all(&range.otherwise, dot);
        }
        let before = self.variables.len();
        for (number, item) in items.into_iter().enumerate() {
            if let Some(name) = range.names.0 {
                self.variables.push((name, Data::Number(number)));
            }
            if let Some(name) = range.names.1 {
                self.variables.push((name, item.clone()));
            }
            self.all(&range.body, &Dot::Item(item))?;
            self.variables.truncate(before);
        }
        Ok(())
    }

    fn value(&self, line: usize, operand: &Operand<'a>, dot: &Dot) -> Result<Data, TemplateError> {
        let whole = || at(line, "this is all of the data: name one of its fields");
        match operand {
            Operand::Literal(data) => Ok(data.clone()),
            Operand::Dot => match dot {
                Dot::Item(item) => Ok(item.clone()),
                Dot::Data => Err(whole()),
            },
            Operand::Variable("$") => Err(whole()),
            Operand::Variable(name) => {
                let held = self.variables.iter().rev().find(|(known, _)| known == name);
                held.map(|(_, data)| data.clone())
                    .ok_or_else(|| at(line, format!("{name} is not set here")))
            }
            Operand::Field(of, field) => {
                let of_data = match of {
                    None => matches!(dot, Dot::Data),
                    Some(name) => *name == "$",
                };
                if !of_data {
                    let of = of.unwrap_or("what the range is at");
                    return Err(at(line, format!("{of} has no .{field}: write $.{field}")));
                }
                Ok(match *field {
                    "PodCIDR" => &self.cidr,
                    "PodCIDRRanges" => &self.ranges,
                    _ => &self.routes,
                }
                .clone())
            }
            Operand::Len(of) => match self.value(line, of, dot)? {
                Data::List(list) => Ok(Data::Number(list.len())),
                Data::Text(text) => Ok(Data::Number(text.len())),
                Data::Number(_) => Err(at(line, "a number has no length")),
            },
            Operand::Index(of, number) => match self.value(line, of, dot)? {
                Data::List(list) => list
                    .get(*number)
                    .cloned()
                    .ok_or_else(|| at(line, format!("there is no item {number}"))),
                _ => Err(at(line, "index of what is no list")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both() -> Vec<IpNet> {
        ["10.1.2.0/24", "fd00:1::/64"]
            .map(|cidr| cidr.parse().unwrap())
            .into()
    }

    #[test]
    fn a_template_as_containerd_has_them() {
        let template = r#"{"ipam": {
  "ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}],
  "routes": [{{range $i, $route := .Routes}}{{if $i}}, {{end}}{"dst": "{{$route}}"}{{end}}]
}, "one": "{{.PodCIDR}}"}"#;
        let text = render(template, &both()).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            json["ipam"]["ranges"],
            serde_json::json!([[{ "subnet": "10.1.2.0/24" }], [{ "subnet": "fd00:1::/64" }]])
        );
        assert_eq!(
            json["ipam"]["routes"],
            serde_json::json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }])
        );
        assert_eq!(json["one"], "10.1.2.0/24");
    }

    #[test]
    fn each_action_does_what_go_does() {
        for (template, expected) in [
            ("{{.PodCIDRRanges}}", "[10.1.2.0/24 fd00:1::/64]"),
            ("{{range .Routes}}<{{.}}>{{end}}", "<0.0.0.0/0><::/0>"),
            (
                "{{range $r := .Routes}}{{$r}},{{$.PodCIDR}};{{end}}",
                "0.0.0.0/0,10.1.2.0/24;::/0,10.1.2.0/24;",
            ),
            (
                "{{len .Routes}} {{index .PodCIDRRanges 1}}",
                "2 fd00:1::/64",
            ),
            ("a {{- /* no */ -}} b", "ab"),
            ("a {{- len .Routes -}} b", "a2b"),
            ("{{if .PodCIDR}}y{{else}}n{{end}}", "y"),
            ("{{if not .PodCIDR}}y{{else}}n{{end}}", "n"),
            (
                "{{if 0}}a{{else if \"\"}}b{{else if len .Routes}}c{{else}}d{{end}}",
                "c",
            ),
            (
                "{{range $i, $r := .Routes}}{{range $.Routes}}{{$i}}{{end}}{{end}}",
                "0011",
            ),
            ("no action }} at all", "no action }} at all"),
            ("", ""),
        ] {
            assert_eq!(
                render(template, &both()).as_deref(),
                Ok(expected),
                "{template}"
            );
        }
        assert_eq!(
            render("{{.PodCIDR}}{{range .Routes}}x{{else}}none{{end}}", &[]).unwrap(),
            "none"
        );
    }

    #[test]
    fn what_is_not_supported_is_named_with_its_line() {
        for (template, expected) in [
            ("\n{{.NodeName}}", "line 2: there is no .NodeName"),
            ("{{.PodCIDR | printf \"%s\"}}", "a pipe"),
            (
                "{{printf \"%s\" .PodCIDR}}",
                "{{printf \"%s\" .PodCIDR}} is not supported",
            ),
            (
                "{{with .PodCIDR}}{{end}}",
                "{{with .PodCIDR}} is not supported",
            ),
            ("{{template \"x\"}}", "is not supported"),
            ("{{$x := .PodCIDR}}", "is not supported"),
            ("{{if .PodCIDR}}", "if without end"),
            ("{{range .Routes}}{{else}}", "range without end"),
            ("{{end}}", "end without its beginning"),
            ("{{else}}", "else without its beginning"),
            (
                "{{range .Routes}}{{else}}{{else}}{{end}}",
                "else after else",
            ),
            ("{{.PodCIDR", "{{ without }}"),
            ("{{}}", "nothing between"),
            ("{{.}}", "all of the data"),
            ("{{$x}}", "$x is not set here"),
            ("{{range .Routes}}{{.PodCIDR}}{{end}}", "write $.PodCIDR"),
            ("{{range .PodCIDR}}{{end}}", "no list"),
            ("{{index .Routes 7}}", "no item 7"),
            ("{{range $ := .Routes}}{{end}}", "$ is no variable"),
        ] {
            let error = render(template, &both()).unwrap_err().to_string();
            assert!(error.contains(expected), "{template}: {error}");
        }
    }

    #[test]
    fn a_template_cannot_grow_without_end() {
        let deep = "{{range $.Routes}}".repeat(30) + "xxxxxxxxxx" + &"{{end}}".repeat(30);
        assert!(render(&deep, &both()).unwrap_err().why.contains("no end"));
        let deeper = "{{if 1}}".repeat(50_000) + &"{{end}}".repeat(50_000);
        assert!(render(&deeper, &both()).unwrap_err().why.contains("levels"));
        let chain = "{{if 0}}".to_owned() + &"{{else if 0}}".repeat(70_000) + "{{end}}";
        assert!(render(&chain, &both()).unwrap_err().why.contains("levels"));
    }
}
